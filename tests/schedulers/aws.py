"""What an administrator sets up in an AWS account before Step Functions can run Metaflow's flows: a job queue, a table,
roles. On the S3 server of the tests, which knows these services too.
"""

from dataclasses import dataclass, field
from typing import Any

import boto3
from s3_server import S3Server

ACCOUNT = "123456789012"
TABLE = "metaflow"
QUEUE = "metaflow"


@dataclass
class Account:
    """`environment` makes Metaflow deploy there, `role` is what a container there has."""

    server: S3Server
    environment: dict[str, str] = field(default_factory=dict)
    role: dict[str, str] = field(default_factory=dict)

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.server.url,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )

    def set_up(self) -> "Account":
        trust = '{"Version": "2012-10-17", "Statement": []}'
        roles = {
            name: self.client("iam").create_role(RoleName=name, AssumeRolePolicyDocument=trust)["Role"]["Arn"]
            for name in ("jobs", "machines", "events", "instances")
        }
        profile = self.client("iam").create_instance_profile(InstanceProfileName="instances")
        ec2 = self.client("ec2")
        subnet = ec2.describe_subnets()["Subnets"][0]
        group = ec2.describe_security_groups()["SecurityGroups"][0]
        batch = self.client("batch")
        made = batch.create_compute_environment(
            computeEnvironmentName="here",
            type="MANAGED",
            state="ENABLED",
            serviceRole=roles["jobs"],
            computeResources={
                "type": "EC2",
                "minvCpus": 0,
                "maxvCpus": 4,
                "instanceRole": profile["InstanceProfile"]["Arn"],
                "instanceTypes": ["m5.large"],
                "subnets": [subnet["SubnetId"]],
                "securityGroupIds": [group["GroupId"]],
            },
        )
        batch.create_job_queue(
            jobQueueName=QUEUE,
            state="ENABLED",
            priority=1,
            computeEnvironmentOrder=[{"order": 1, "computeEnvironment": made["computeEnvironmentArn"]}],
        )
        self.client("dynamodb").create_table(
            TableName=TABLE,
            KeySchema=[{"AttributeName": "pathspec", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "pathspec", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        self.role = {**self.server.environment, "AWS_ENDPOINT_URL": self.server.url}
        self.environment = {
            **self.role,
            "METAFLOW_BATCH_JOB_QUEUE": QUEUE,
            "METAFLOW_ECS_S3_ACCESS_IAM_ROLE": roles["jobs"],
            "METAFLOW_SFN_IAM_ROLE": roles["machines"],
            "METAFLOW_EVENTS_SFN_ACCESS_IAM_ROLE": roles["events"],
            "METAFLOW_SFN_DYNAMO_DB_TABLE": TABLE,
        }
        return self

    def state_machine(self, name: str) -> dict[str, Any]:
        client = self.client("stepfunctions")
        [arn] = [
            machine["stateMachineArn"]
            for machine in client.list_state_machines()["stateMachines"]
            if machine["name"] == name
        ]
        return client.describe_state_machine(stateMachineArn=arn)
