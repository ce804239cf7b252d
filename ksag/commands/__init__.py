"""What stands behind `ksag`: a file for each command, and one for each thing that they share."""
