"""Few bits a number: rounding, the rotations before it, and products of rounded matrices."""
