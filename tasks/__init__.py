"""Task samplers and the problems posed on them, one file per family."""

if __name__ != "metadist.tasks":
    raise ImportError("import metadist.tasks, not tasks: a bare name may be any module")
