"""Everything that runs on Ray: workers, parameter server, scheduler, policies, launching."""

if __name__ != "metadist.cluster":
    raise ImportError("import metadist.cluster, not cluster: a bare name may be any module")
