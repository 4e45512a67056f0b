use super::*;

fn read(variables: &[(&str, &str)]) -> Result<Launch, Error> {
    Launch::read(&|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
}

fn position(rank: usize, world_size: usize, local_rank: usize, local_world_size: usize) -> RankPosition {
    RankPosition { rank, world_size, local_rank, local_world_size }
}

/// A launcher's variables, and the rank, the address and the number of restarts that follow from them.
type Case<'a> = (&'static str, &'a [(&'static str, &'static str)], RankPosition, &'static str, u32);

#[test]
fn ranks_of_every_launcher() {
    let cases: &[Case<'_>] = &[
        (
            "torchrun",
            &[
                ("RANK", "5"),
                ("WORLD_SIZE", "8"),
                ("LOCAL_RANK", "1"),
                ("LOCAL_WORLD_SIZE", "4"),
                ("GROUP_RANK", "1"),
                ("MASTER_ADDR", "node0"),
                ("MASTER_PORT", "29400"),
                ("TORCHELASTIC_RESTART_COUNT", "2"),
                ("TORCHELASTIC_RUN_ID", "none"),
                ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ],
            position(5, 8, 1, 4),
            "node0:29401-29416",
            2,
        ),
        (
            "torchrun",
            &[
                ("RANK", "0"),
                ("WORLD_SIZE", "2"),
                ("LOCAL_RANK", "0"),
                ("LOCAL_WORLD_SIZE", "2"),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", "29500"),
                ("TORCHELASTIC_RUN_ID", "none"),
                ("TORCHELASTIC_USE_AGENT_STORE", "False"),
            ],
            position(0, 2, 0, 2),
            "127.0.0.1:29500",
            0,
        ),
        (
            "the launcher with RANK and WORLD_SIZE",
            &[("RANK", "1"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "job-master-0"), ("MASTER_PORT", "23456")],
            position(1, 3, 0, 1),
            "job-master-0:23456",
            0,
        ),
        (
            "the launcher with RANK and WORLD_SIZE", // Ray Train
            &[
                ("RANK", "3"),
                ("WORLD_SIZE", "4"),
                ("LOCAL_RANK", "1"),
                ("LOCAL_WORLD_SIZE", "2"),
                ("NODE_RANK", "1"),
                ("MASTER_ADDR", "10.0.0.4"),
                ("MASTER_PORT", "41231"),
            ],
            position(3, 4, 1, 2),
            "10.0.0.4:41231",
            0,
        ),
        (
            "Slurm",
            &[
                ("SLURM_JOB_ID", "123456"),
                ("SLURM_STEP_ID", "0"),
                ("SLURM_PROCID", "6"),
                ("SLURM_LOCALID", "2"),
                ("SLURM_NODEID", "1"),
                ("SLURM_STEP_NUM_TASKS", "7"),
                ("SLURM_STEP_NUM_NODES", "2"),
                ("SLURM_STEP_TASKS_PER_NODE", "4,3"),
                ("SLURM_STEP_NODELIST", "gpu[07-08]"),
                ("SLURM_RESTART_COUNT", "1"),
            ],
            position(6, 7, 2, 3),
            "gpu07:23456",
            1,
        ),
        (
            "Slurm", // on one node, with a port and PMI2
            &[
                ("SLURM_JOB_ID", "9"),
                ("SLURM_PROCID", "1"),
                ("SLURM_LOCALID", "1"),
                ("SLURM_STEP_NUM_TASKS", "2"),
                ("SLURM_STEP_NUM_NODES", "1"),
                ("PMI_RANK", "1"),
                ("PMI_SIZE", "2"),
                ("MASTER_PORT", "1234"),
            ],
            position(1, 2, 1, 2),
            "127.0.0.1:1234",
            0,
        ),
        (
            "Open MPI",
            &[
                ("OMPI_COMM_WORLD_RANK", "1"),
                ("OMPI_COMM_WORLD_SIZE", "2"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ],
            position(1, 2, 1, 2),
            "127.0.0.1:29500",
            0,
        ),
        (
            "Open MPI", // in a Slurm allocation
            &[
                ("OMPI_COMM_WORLD_RANK", "3"),
                ("OMPI_COMM_WORLD_SIZE", "4"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
                ("SLURM_JOB_ID", "20001"),
                ("SLURM_JOB_NODELIST", "a1,a2"),
                ("SLURM_PROCID", "1"),
                ("SLURM_STEP_NUM_TASKS", "2"),
            ],
            position(3, 4, 1, 2),
            "a1:20001",
            0,
        ),
        (
            "MVAPICH",
            &[
                ("MV2_COMM_WORLD_RANK", "0"),
                ("MV2_COMM_WORLD_SIZE", "2"),
                ("MV2_COMM_WORLD_LOCAL_RANK", "0"),
                ("MV2_COMM_WORLD_LOCAL_SIZE", "1"),
                ("MASTER_ADDR", "n1"),
            ],
            position(0, 2, 0, 1),
            "n1:29500",
            0,
        ),
        (
            "MPI", // MPICH and Intel MPI, whose proxies Slurm started
            &[
                ("PMI_RANK", "2"),
                ("PMI_SIZE", "4"),
                ("MPI_LOCALRANKID", "0"),
                ("MPI_LOCALNRANKS", "2"),
                ("MASTER_ADDR", "n1"),
                ("MASTER_PORT", "3000"),
                ("SLURM_PROCID", "1"),
                ("SLURM_STEP_NUM_TASKS", "2"),
            ],
            position(2, 4, 0, 2),
            "n1:3000",
            0,
        ),
    ];
    for (launcher, variables, position, address, restarts) in cases {
        let launch = read(variables).unwrap();
        assert_eq!((launch.launcher, launch.restarts), (Some(*launcher), *restarts), "{variables:?}");
        let LaunchRole::Rank(rank) = launch.role else { panic!("{variables:?}") };
        assert_eq!((rank.position, &*rank.master.to_string()), (*position, *address), "{launcher}");
    }
}

#[test]
fn launchers_of_one_process_on_each_host() {
    type Case = (&'static str, &'static [(&'static str, &'static str)], NodeLaunch);
    let cases: [Case; 2] = [
        (
            "Kubeflow Trainer",
            &[
                ("PET_NNODES", "2"),
                ("PET_NPROC_PER_NODE", "4"),
                ("PET_NODE_RANK", "1"),
                ("PET_MASTER_ADDR", "job-node-0-0.job"),
                ("PET_MASTER_PORT", "29400"),
            ],
            NodeLaunch {
                node_rank: 1,
                nodes: 2,
                ranks_per_node: 4,
                master: MasterAddress::new("job-node-0-0.job", 29400),
            },
        ),
        (
            "SkyPilot",
            &[
                ("SKYPILOT_NUM_NODES", "2"),
                ("SKYPILOT_NODE_RANK", "0"),
                ("SKYPILOT_NODE_IPS", "10.0.0.1\n10.0.0.2\n"),
                ("SKYPILOT_NUM_GPUS_PER_NODE", "0"),
            ],
            NodeLaunch { node_rank: 0, nodes: 2, ranks_per_node: 1, master: MasterAddress::new("10.0.0.1", 29500) },
        ),
    ];
    for (launcher, variables, node) in cases {
        let launch = read(variables).unwrap();
        assert_eq!((launch.launcher, launch.role), (Some(launcher), LaunchRole::Node(node)), "{variables:?}");
    }
}

#[test]
fn one_rank_is_no_distributed_run() {
    let cases: [&[(&str, &str)]; 6] = [
        &[],
        &[("WORLD_SIZE", "1")],
        &[("RANK", "0"), ("WORLD_SIZE", "1")],
        // A batch script, outside of any step.
        &[("SLURM_JOB_ID", "7"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")],
        &[("SKYPILOT_NUM_NODES", "1"), ("SKYPILOT_NUM_GPUS_PER_NODE", "8")],
        &[("PET_NNODES", "1"), ("PET_NPROC_PER_NODE", "auto")],
    ];
    for variables in cases {
        assert_eq!(read(variables).unwrap().role, LaunchRole::Alone, "{variables:?}");
    }
    let restarted = [("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "3")];
    assert_eq!(read(&restarted).unwrap().restarts, 3, "a single rank is restarted too");
}

#[test]
fn errors_name_the_variable() {
    let cases: [(&[(&str, &str)], &str); 9] = [
        (&[("WORLD_SIZE", "4")], "WORLD_SIZE is 4, but RANK is not set"),
        (&[("RANK", "1")], "RANK is 1, but WORLD_SIZE is not set"),
        (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK is \"x\", which is not a whole number"),
        (&[("RANK", "2"), ("WORLD_SIZE", "2")], "rank 2 of 2"),
        (&[("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR is not set"),
        (&[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "0")], "MASTER_PORT is \"0\""),
        (&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")], "mpirun -x MASTER_ADDR"),
        (&[("PET_NNODES", "1:4")], "PET_NNODES is \"1:4\""),
        (&[("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "0")], "SLURM_LOCALID is not set"),
    ];
    for (variables, part) in cases {
        let error = read(variables).unwrap_err().to_string();
        assert!(error.contains(part), "{variables:?}: {error}");
    }
}

#[test]
fn ranks_of_the_own_launcher() {
    let master = MasterAddress::new("127.0.0.1", 40_000);
    let variables = Launch::rank_variables(position(2, 3, 2, 3), &master);
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, &**value)).collect();
    let launch = read(&variables).unwrap();
    assert!(launch.is_own());
    let LaunchRole::Rank(rank) = launch.role else { panic!("a rank") };
    assert_eq!((rank.position, &*rank.master.to_string()), (position(2, 3, 2, 3), "127.0.0.1:40000-40015"));
}
