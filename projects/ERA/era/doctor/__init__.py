"""What ``tools/doctor.py`` does: everything that can be known before a long run is started."""
