"""The version of this project, which config.json of a run names."""

VERSION = "0.3.0"
