"""The bytes of a checkpoint file. Pure: no file is opened here."""
