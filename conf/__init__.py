"""The YAML groups that make up a configuration, one root file per verb and one folder per group."""
