"""The faults: a file for each incident, whose definitions stand in for the service's of the same name."""
