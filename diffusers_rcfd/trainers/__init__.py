"""The trainers, their loop and their options."""
