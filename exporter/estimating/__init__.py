"""What files and runs need: bytes to the byte, memory by line, disk, and hours."""
