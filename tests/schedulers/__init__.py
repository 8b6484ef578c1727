"""Argo Workflows and AWS Step Functions on this machine: what Metaflow compiles for them is deployed to servers on
localhost and executed, each container as a process that sees no more than a pod would.

    images.py           the Python environment of a pod's image
    pods.py             one container: file systems and process ids of its own, signals as its runtime delivers them
    cluster.py          the part of the Kubernetes API that deploys workflows
    argo.py             workflow templates: DAGs, foreach, parameters, retries
    step_functions.py   state machines: Task, Map, Parallel, and the Batch jobs they submit
"""
