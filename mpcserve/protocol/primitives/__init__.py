"""The interactive instructions, one file each: deal, prepare and evaluate side by side."""
