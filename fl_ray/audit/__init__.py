"""What a finished run gives away of its clients' training images."""
