"""The command line: a module for each command, named like it, which reads its options and runs in `main`."""
