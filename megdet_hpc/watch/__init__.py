"""`megdet watch`: a run in the terminal, from its files alone."""
