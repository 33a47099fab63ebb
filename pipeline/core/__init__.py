"""What every other package uses: device, settings, files, errors, the command line."""
