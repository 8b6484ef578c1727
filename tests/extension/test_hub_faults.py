"""Faults in real runs: killed at a write, damaged bytes, full and read-only disks, tokens in sight."""

def test_try(run_flow, project):
    o = run_flow("killed_writes_flow.py")
    print(o.output)
    o = run_flow("killed_writes_flow.py", "--kills", "2,7,10,13")
    print(o.output)
    assert 0
