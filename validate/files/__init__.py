"""Files that somebody wrote: found, described, and compared with what they should hold before they run."""
