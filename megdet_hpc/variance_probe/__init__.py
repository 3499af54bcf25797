"""A measurement of what the linear scaling rule assumes: the gradient's variance by mini-batch, and its exponent."""
