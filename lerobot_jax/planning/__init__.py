"""What a train step needs of the hardware, found out by compiling it for that hardware, which need not be there."""
