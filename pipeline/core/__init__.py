"""Device, settings, files, errors and the command line: what the other packages use."""
