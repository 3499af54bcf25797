"""What the linear scaling rule assumes of gradients, estimated: variance by size, its exponent, a picture."""
