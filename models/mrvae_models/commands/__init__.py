"""Sub-commands of `mrvae`, a file each: TEXT and HELP, add(command) for its arguments, run(options) -> exit code.

Nothing heavy is imported before run().
"""
