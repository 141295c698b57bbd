"""What is done before and after training; imports the core and is imported by command lines only."""
