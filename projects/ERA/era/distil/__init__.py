"""What ``tools/distil.py`` does: from a folder of annotated pictures to a deployed student, in one command.

``request`` reads what is asked for, ``annotations`` the data, ``anchors`` and ``choices`` settle every setting by pure
functions, ``configs`` writes them as ordinary configs, ``timing`` takes a few steps of each training, ``plan`` puts all of
it together, ``state`` remembers it, and ``products`` exports the student and writes the report.
"""
