"""The command line and the verbs around a run."""
