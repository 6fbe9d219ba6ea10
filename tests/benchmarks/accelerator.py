"""placeholder"""


def report(**_): ...
