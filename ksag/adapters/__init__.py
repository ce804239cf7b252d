"""Foreign UNets and their schedules as k-diffusion denoisers, one file per library."""
