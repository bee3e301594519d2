"""Fetching released dictionaries from the Hugging Face hub, from a mirror of it, or from a folder.

huggingface_hub does the addressing, the log-in and the errors. It leaves out what files of 50 GB need, and that is
here: a download that was stopped goes on where it was (``download.py``), every byte is checked against the hub's hash
before a file gets its name, a busy hub is waited for, but not for ever (``retry.py``), and what was fetched, from where
and in which revision is written beside the files (``record.py``).
"""
