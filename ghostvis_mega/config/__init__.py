"""Settings of a run: typed, checked as a whole before anything starts."""
