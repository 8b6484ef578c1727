"""The commands of ``metaflow hf``, for people at a terminal.

A package of its own, and so no part of the code that Metaflow ships with each remote task: `group` names the commands,
`checks` are those of ``metaflow hf doctor``, `templates` what ``metaflow hf init`` writes, `fixtures` what
``metaflow hf demo-hub --fixtures`` serves, as our tests do.
"""
