"""The command line. Importing it imports no torch; each command loads what it needs when it runs."""
