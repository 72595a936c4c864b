"""Guesses about what comes next, who makes them, and how many pay."""
