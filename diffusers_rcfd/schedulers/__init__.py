"""Noise schedules and the steps of samplers."""
