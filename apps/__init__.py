"""What people touch: the command line, the report and the stream."""
