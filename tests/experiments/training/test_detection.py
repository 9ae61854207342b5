"""Which program JAX joins from the variables of each launcher, with JAX's own detection.

Only what is not on this machine is replaced: Google's metadata server and the client of the Kubernetes API.
"""

import os
import socket
import sys
import types
from typing import NamedTuple

import jax
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster, cluster, k8s_cluster

from experiments.training import launchers, processes

PREFIXES = ("SLURM", "OMPI", "TPU_", "MEGASCALE", "KUBERNETES", "JOB_", "CUDA_VISIBLE", "JAX_COORDINATOR")


class Joined(NamedTuple):
    """The arguments with which JAX joins a program."""

    coordinator: str
    processes: int
    process: int
    devices: list[int] | None


@pytest.fixture
def join(monkeypatch):
    """A function that starts a process with these variables on a node with GPUs; the program that it joins, or None."""
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: f"address of {name}")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    joined = []

    def initialize(coordinator=None, count=None, process=None, *, local_device_ids=None, cluster_detection_method=None):
        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, count, process, local_device_ids, cluster_detection_method, 300
        )
        if None in found[:3]:
            raise ValueError("coordinator_address should be defined.")
        joined.append(Joined(*found))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)

    def start(environment, gpus=0, **arguments):
        monkeypatch.setattr(launchers, "gpus_of_node", lambda: gpus)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        processes.start(**arguments)
        return joined.pop() if joined else None

    return start


@pytest.fixture
def tpu(monkeypatch):
    """A machine with TPUs, whose metadata server has these attributes."""
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)

    def with_metadata(**attributes):
        answer = lambda key: (attributes.get(key.replace("-", "_"), ""), 200 if attributes else 404)
        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", answer)

    with_metadata()
    return with_metadata


@pytest.fixture
def kubernetes(monkeypatch):
    """A client of the Kubernetes API that knows one job, its pods and their subdomain."""

    def install(parallelism, subdomain="pods", **labels):
        of = types.SimpleNamespace
        owner = of(kind="Job", controller=True)
        pod = of(
            metadata=of(name="pod", labels={"job-name": "study"}, owner_references=[owner]),
            spec=of(subdomain=subdomain),
        )
        job = of(metadata=of(name="study", labels=labels), spec=of(parallelism=parallelism))
        client = types.ModuleType("kubernetes")
        client.config = of(load_incluster_config=lambda: None)
        client.client = of(
            CoreV1Api=lambda: of(list_namespaced_pod=lambda namespace, field_selector: of(items=[pod])),
            BatchV1Api=lambda: of(read_namespaced_job=lambda name, namespace: job),
            exceptions=of(ApiException=type("ApiException", (Exception,), {})),
        )
        monkeypatch.setitem(sys.modules, "kubernetes", client)
        for name in ("_pod", "_job", "_controller"):
            getattr(k8s_cluster.K8sCluster, name).__func__.cache_clear()
        monkeypatch.setattr(k8s_cluster.K8sCluster, "_namespace", lambda: "default")
        monkeypatch.setattr(k8s_cluster.time, "sleep", lambda seconds: None)

    return install


def indexed(index):
    return {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index), "HOSTNAME": "study-1"}


def slurm_step(nodes, tasks, process, local):
    """The variables of a task of the first step of job 7."""
    return {
        **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": f"gpu[1-{nodes}]"},
        **{"SLURM_NTASKS": str(nodes * tasks), "SLURM_STEP_NUM_TASKS": str(nodes * tasks)},
        **{"SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})", "SLURM_PROCID": str(process)},
        **{"SLURM_NODEID": str(process // tasks), "SLURM_LOCALID": str(local)},
    }


def test_one_slurm_task_a_node_uses_all_its_gpus_and_several_use_one_each(join):
    alone = join(slurm_step(nodes=4, tasks=1, process=2, local=0), gpus=8)
    assert alone == Joined("gpu1:61447", 4, 2, [0, 1, 2, 3, 4, 5, 6, 7])
    shared = join(slurm_step(nodes=2, tasks=8, process=13, local=5), gpus=8)
    assert shared == Joined("gpu1:61447", 16, 13, [5])


def test_one_process_of_mpirun_a_node_uses_all_its_gpus_and_several_use_one_each(join):
    """The job 4096 * 9 of Open MPI; JAX takes the port from its number."""
    launcher = {"OMPI_MCA_orte_hnp_uri": "36864.0;tcp://10.96.0.1,10.148.0.1:34911"}
    world = lambda size, rank: {"OMPI_COMM_WORLD_SIZE": str(size), "OMPI_COMM_WORLD_RANK": str(rank)}
    node = lambda size, rank: {"OMPI_COMM_WORLD_LOCAL_SIZE": str(size), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}
    alone = join({**launcher, **world(4, 3), **node(1, 0)}, gpus=8)
    assert alone == Joined("10.96.0.1:61449", 4, 3, [0, 1, 2, 3, 4, 5, 6, 7])
    assert join({**launcher, **world(16, 13), **node(8, 5)}, gpus=8) == Joined("10.96.0.1:61449", 16, 13, [5])


def test_the_pods_of_an_indexed_job_join_with_all_their_gpus(join, kubernetes):
    kubernetes(parallelism=4)
    assert join(indexed(3), gpus=8) == Joined("study-0.pods:55527", 4, 3, [0, 1, 2, 3, 4, 5, 6, 7])
    assert join(indexed(3), gpus=8, separate=True) is None  # with --shard


def test_the_pods_of_a_job_set_join_under_its_name(join, kubernetes):
    kubernetes(parallelism=2, subdomain=None, **{"jobset.sigs.k8s.io/jobset-name": "set"})
    assert join(indexed(1)) == Joined("study-0.set:55527", 2, 1, None)


def test_a_pod_outside_of_an_indexed_job_computes_alone(join, kubernetes):
    kubernetes(parallelism=2)
    assert join({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, gpus=8) is None


@pytest.mark.parametrize(
    ("variables", "joined", "part"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}, ("a:8482", 4, 2, None), (2, 4)),
        (
            {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "1"},
            ("a:8482", 2, 1, None),
            (1, 2),
        ),
        # Two slices of two hosts, and two slices of one host each.
        (
            {"TPU_WORKER_HOSTNAMES": "c,d", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
             "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a:8080"},
            ("a:8482", 4, 3, None),
            (3, 4),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2",
             "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a"},
            ("a:8482", 2, 1, None),
            (1, 2),
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("tpu")
def test_the_hosts_of_a_tpu_pod_join_and_refuse_a_shard(join, variables, joined, part):
    """In an indexed job the variables of the TPUs count. Independent processes divide the work by the same numbers."""
    assert join(variables) == join({**variables, **indexed(1)}) == Joined(*joined)
    assert launchers.shard_of(None, variables, one_program=False)[0] == part
    for environment in (variables, {**variables, **indexed(1)}):
        with pytest.raises(ValueError, match=rf"shard='0/2' cannot be combined with {joined[1]} processes"):
            launchers.shard_of("0/2", environment)


def test_one_host_with_tpus_computes_alone_or_the_part_that_it_is_given(join, tpu):
    alone = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    assert join(alone) is None
    assert launchers.shard_of("1/4", alone)[0] == launchers.shard_of("1/4", {**alone, **indexed(1)})[0] == (1, 4)


def test_a_terminated_process_of_a_program_ends(join):
    """The preemption service of JAX would catch SIGTERM and let the process run on."""
    join({})
    assert not jax.config.jax_enable_preemption_service


def test_the_virtual_machines_of_a_tpu_pod_join_by_their_metadata(join, tpu, monkeypatch):
    tpu(agent_worker_number="1", worker_network_endpoints="a:1:10.0.0.1,b:2:10.0.0.2")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    assert join({}) == Joined("10.0.0.1:8482", 2, 1, None)
    tpu()  # a machine with TPUs outside of Google's cloud
    assert join({}) is None


def test_a_machine_without_tpus_asks_no_metadata_server(join, tpu, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda: pytest.fail("asked"))
    assert join({}) is None


def test_a_shard_in_a_program_of_several_processes_is_refused(monkeypatch):
    """The virtual machines of a TPU pod form one program, and no variable says so before it has started."""
    processes.check_shard("0/2")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    processes.check_shard(None)
    with pytest.raises(ValueError, match=r"shard='0/2' cannot be combined with the 4 processes of this program"):
        processes.check_shard("0/2")
