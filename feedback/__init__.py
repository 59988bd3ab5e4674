"""People to events to dataset: the feedback service, the log, the rules and the importers."""
