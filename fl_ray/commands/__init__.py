"""What the commands of the command line do; each imports what it needs when it is called."""
