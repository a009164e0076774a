class UserError(Exception):
    """Something the user can put right: a script shows it as one sentence, without a traceback."""
