"""GLUE and SuperGLUE: tasks, their files, official metrics and submissions."""
