"""Public inputs and habits that once went wrong, each with its right value."""
