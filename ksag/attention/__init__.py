"""One layer of a model: finding it, reading it, checking what was read, and changing it for some rows of the batch."""
