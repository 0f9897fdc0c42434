"""Pipelines that sample."""
