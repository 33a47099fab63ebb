"""Modules that all other packages use: device, settings, files, errors and the command line."""
