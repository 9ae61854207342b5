"""The run-time type checker of the tests: an int may stand where a float is asked for, as for a static one."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
