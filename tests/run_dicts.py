"""Configs of runs as the nested mappings that `RunConfig.from_dict` takes."""

from configs import tiny


def run_dict(**changes):
    """The tiny run's config; `changes` are section__key=value."""
    given = tiny.get_config().to_dict()
    for name, value in changes.items():
        section, key = name.split("__")
        given[section][key] = value
    return given
