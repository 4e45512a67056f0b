//! The ranks that a launcher started, read from its variables.

mod hostlist;
mod variables;

use core::fmt;

use crate::{Error, RankPosition};
use variables::Variables;

/// The launcher of a process, its role, and the number of restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The launcher's name; `None` without one.
    pub launcher: Option<&'static str>,
    /// The role of this process.
    pub role: LaunchRole,
    /// The number of times that the launcher has started this run again.
    pub restarts: u32,
}

/// The role of a process in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchRole {
    /// The only rank.
    Alone,
    /// One of several ranks.
    Rank(RankLaunch),
    /// The only process of a host, which starts the ranks of that host.
    Node(NodeLaunch),
}

/// One of several ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankLaunch {
    /// The place of this rank.
    pub position: RankPosition,
    /// The address of rank 0.
    pub master: MasterAddress,
    /// The name of this attempt of the run. Ranks of another attempt are refused.
    pub attempt: String,
}

/// The place of a host in a run whose launcher starts one process on each host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeLaunch {
    /// The number of this host, from 0.
    pub node_rank: usize,
    /// The number of hosts.
    pub nodes: usize,
    /// The number of ranks on each host.
    pub ranks_per_node: usize,
    /// The address of rank 0.
    pub master: MasterAddress,
}

/// The address of rank 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MasterAddress {
    /// A name or IP address.
    pub host: String,
    /// The ports that rank 0 may listen on: it takes the first that is free, and the others try them in turn.
    pub ports: Vec<u16>,
}

/// The port if no variable has one, as in PyTorch.
const DEFAULT_PORT: u16 = 29500;

/// The number of ports that are tried where the given one may be in use.
const PORTS_TRIED: u16 = 16;

/// Set by `rekindle train --ranks` for the ranks that it starts.
const OWN_LAUNCHER: &str = "REKINDLE_LAUNCHER";

impl MasterAddress {
    /// Returns an address with one port.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), ports: vec![port] }
    }

    /// Returns an address with `port` and the ports above it, for a port that may be in use.
    fn from_port(host: impl Into<String>, port: u16) -> Self {
        let above = (0..PORTS_TRIED).map(|above| port.checked_add(above).unwrap_or(1024 + above));
        Self { host: host.into(), ports: above.collect() }
    }
}

impl fmt::Display for MasterAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.ports[..] {
            [first, .., last] => write!(f, "{}:{first}-{last}", self.host),
            ports => write!(f, "{}:{}", self.host, ports.first().copied().unwrap_or_default()),
        }
    }
}

impl Launch {
    /// Reads the variables of this process.
    ///
    /// # Errors
    /// [`Error::Variables`] for variables that are incomplete or invalid.
    pub fn from_env() -> Result<Self, Error> {
        Self::read(&|name| std::env::var(name).ok())
    }

    /// Reads variables from `get`.
    ///
    /// The first of these that is set decides: `RANK` and `WORLD_SIZE` (torchrun, accelerate, Ray, PyTorchJob), Open MPI,
    /// MVAPICH, a Slurm step, PMI (MPICH, Intel MPI), `PET_NNODES` (Kubeflow Trainer), SkyPilot.
    ///
    /// # Errors
    /// [`Error::Variables`] for variables that are incomplete or invalid.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let variables = Variables { get };
        let found = None
            .or_else(|| torchrun(&variables).transpose())
            .or_else(|| mpi(&variables, "Open MPI", "OMPI_COMM_WORLD").transpose())
            .or_else(|| mpi(&variables, "MVAPICH", "MV2_COMM_WORLD").transpose())
            .or_else(|| slurm(&variables).transpose())
            .or_else(|| pmi(&variables).transpose())
            .or_else(|| kubeflow(&variables).transpose())
            .or_else(|| skypilot(&variables).transpose());
        found.unwrap_or(Ok(Self { launcher: None, role: LaunchRole::Alone, restarts: 0 }))
    }

    /// Returns the variables for a rank that this process starts, on top of its own.
    pub fn rank_variables(position: RankPosition, master: &MasterAddress) -> Vec<(&'static str, String)> {
        let RankPosition { rank, world_size, local_rank, local_world_size } = position;
        vec![
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", world_size.to_string()),
            ("LOCAL_RANK", local_rank.to_string()),
            ("LOCAL_WORLD_SIZE", local_world_size.to_string()),
            ("MASTER_ADDR", master.host.clone()),
            ("MASTER_PORT", master.ports.first().copied().unwrap_or(DEFAULT_PORT).to_string()),
            (OWN_LAUNCHER, "1".to_owned()),
        ]
    }

    /// Returns true if `rekindle train --ranks` started this process.
    pub fn is_own(&self) -> bool {
        self.launcher == Some(REKINDLE)
    }

    /// Returns a rank of `launcher`; a world of one rank is no distributed run.
    fn ranked(
        launcher: &'static str,
        position: RankPosition,
        restarts: u32,
        run: Option<String>,
        master: impl FnOnce() -> Result<MasterAddress, Error>,
    ) -> Result<Self, Error> {
        let RankPosition { rank, world_size, local_rank, local_world_size } = position;
        if rank >= world_size || local_rank >= local_world_size || local_world_size > world_size {
            return Err(Error::Variables(format!(
                "the variables of {launcher} describe rank {rank} of {world_size} (local rank {local_rank} of \
                 {local_world_size}), which is no rank"
            )));
        }
        if world_size == 1 {
            return Ok(Self { launcher: Some(launcher), role: LaunchRole::Alone, restarts });
        }
        let attempt = format!("{} {restarts}", run.unwrap_or_default());
        let role = LaunchRole::Rank(RankLaunch { position, master: master()?, attempt });
        Ok(Self { launcher: Some(launcher), role, restarts })
    }
}

const REKINDLE: &str = "rekindle";

/// `RANK`, `WORLD_SIZE` and the like.
fn torchrun(of: &Variables<'_>) -> Result<Option<Launch>, Error> {
    let (rank, world_size) = match (of.number("RANK")?, of.number("WORLD_SIZE")?) {
        (Some(rank), Some(world_size)) => (rank, world_size),
        (None, None | Some(1)) | (Some(0), None) => return Ok(None),
        (None, Some(_)) => return Err(of.lacks("WORLD_SIZE", "RANK")),
        (Some(_), None) => return Err(of.lacks("RANK", "WORLD_SIZE")),
    };
    let is_own = of.text(OWN_LAUNCHER).is_some();
    let launcher = if is_own {
        REKINDLE
    } else if of.text("TORCHELASTIC_RUN_ID").is_some() {
        "torchrun"
    } else {
        "the launcher with RANK and WORLD_SIZE"
    };
    let position = RankPosition {
        rank,
        world_size,
        local_rank: of.number("LOCAL_RANK")?.unwrap_or(0),
        local_world_size: of.number("LOCAL_WORLD_SIZE")?.unwrap_or(1),
    };
    let restarts = of.number("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0) as u32;
    let master = || {
        let host = of.text("MASTER_ADDR").ok_or_else(|| of.lacks("RANK", "MASTER_ADDR"))?;
        let port = of.port("MASTER_PORT")?.unwrap_or(DEFAULT_PORT);
        // torchrun's agent serves a store of its own on MASTER_PORT.
        let is_taken = of.text("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True");
        Ok(match (is_taken, is_own) {
            (true, _) => MasterAddress::from_port(host, port.checked_add(1).unwrap_or(1024)),
            (false, true) => MasterAddress::from_port(host, port),
            (false, false) => MasterAddress::new(host, port),
        })
    };
    Launch::ranked(launcher, position, restarts, of.text("TORCHELASTIC_RUN_ID"), master).map(Some)
}

/// `<prefix>_RANK`, `<prefix>_SIZE`, `<prefix>_LOCAL_RANK` and `<prefix>_LOCAL_SIZE`.
fn mpi(of: &Variables<'_>, launcher: &'static str, prefix: &str) -> Result<Option<Launch>, Error> {
    let [rank, size, local_rank, local_size] =
        ["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"].map(|name| format!("{prefix}_{name}"));
    let Some(number) = of.number(&rank)? else { return Ok(None) };
    let position = RankPosition {
        rank: number,
        world_size: of.number(&size)?.ok_or_else(|| of.lacks(&rank, &size))?,
        local_rank: of.number(&local_rank)?.unwrap_or(0),
        local_world_size: of.number(&local_size)?.unwrap_or(1),
    };
    Launch::ranked(launcher, position, restarts_of_slurm(of)?, None, || mpi_master(of, launcher, position)).map(Some)
}

/// `PMI_RANK` and `PMI_SIZE`.
fn pmi(of: &Variables<'_>) -> Result<Option<Launch>, Error> {
    let Some(rank) = of.number("PMI_RANK")? else { return Ok(None) };
    let position = RankPosition {
        rank,
        world_size: of.number("PMI_SIZE")?.ok_or_else(|| of.lacks("PMI_RANK", "PMI_SIZE"))?,
        local_rank: of.number("MPI_LOCALRANKID")?.unwrap_or(0),
        local_world_size: of.number("MPI_LOCALNRANKS")?.unwrap_or(1),
    };
    Launch::ranked("MPI", position, restarts_of_slurm(of)?, None, || mpi_master(of, "MPI", position)).map(Some)
}

/// Returns the address of rank 0, which MPI does not pass on.
fn mpi_master(of: &Variables<'_>, launcher: &str, position: RankPosition) -> Result<MasterAddress, Error> {
    let is_local = position.local_world_size == position.world_size;
    let host = match of.text("MASTER_ADDR") {
        Some(host) => host,
        None if is_local => "127.0.0.1".to_owned(),
        None => match first_slurm_host(of)? {
            Some(host) => host,
            None => {
                return Err(Error::Variables(format!(
                    "{launcher} started ranks on several hosts and passes no address of rank 0; set MASTER_ADDR to the host \
                     of rank 0, for example with mpirun -x MASTER_ADDR=host"
                )));
            }
        },
    };
    let port = of.port("MASTER_PORT")?.map_or_else(|| slurm_port(of), |port| Ok(Some(port)))?;
    Ok(MasterAddress::new(host, port.unwrap_or(DEFAULT_PORT)))
}

/// A step of a Slurm job, as srun starts it. A batch script has no step and is a process of its own.
fn slurm(of: &Variables<'_>) -> Result<Option<Launch>, Error> {
    let Some(world_size) = of.number("SLURM_STEP_NUM_TASKS")? else { return Ok(None) };
    // Under MPICH's mpirun, the step holds its proxies, and PMI has the ranks.
    if of.number("PMI_SIZE")?.is_some_and(|size| size != world_size) {
        return Ok(None);
    }
    let need = |name: &str| of.number(name)?.ok_or_else(|| of.lacks("SLURM_STEP_NUM_TASKS", name));
    let nodes = of.number("SLURM_STEP_NUM_NODES")?.or(of.number("SLURM_NNODES")?).unwrap_or(1);
    let node = of.number("SLURM_NODEID")?.unwrap_or(0);
    let tasks = of.text("SLURM_STEP_TASKS_PER_NODE").or_else(|| of.text("SLURM_TASKS_PER_NODE"));
    let local_world_size = match (nodes, tasks) {
        (1, _) => world_size,
        (_, Some(tasks)) => hostlist::tasks_of_node(&tasks, node).unwrap_or(1),
        (_, None) => 1,
    };
    let position =
        RankPosition { rank: need("SLURM_PROCID")?, world_size, local_rank: need("SLURM_LOCALID")?, local_world_size };
    let master = || {
        let host = match (of.text("MASTER_ADDR"), nodes) {
            (Some(host), _) => host,
            (None, 1) => "127.0.0.1".to_owned(),
            (None, _) => {
                first_slurm_host(of)?.ok_or_else(|| of.lacks("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"))?
            }
        };
        let port = of.port("MASTER_PORT")?.map_or_else(|| slurm_port(of), |port| Ok(Some(port)))?;
        Ok(MasterAddress::new(host, port.unwrap_or(DEFAULT_PORT)))
    };
    let step = of.text("SLURM_JOB_ID").map(|job| format!("{job}.{}", of.text("SLURM_STEP_ID").unwrap_or_default()));
    Launch::ranked("Slurm", position, restarts_of_slurm(of)?, step, master).map(Some)
}

fn restarts_of_slurm(of: &Variables<'_>) -> Result<u32, Error> {
    Ok(of.number("SLURM_RESTART_COUNT")?.unwrap_or(0) as u32)
}

fn first_slurm_host(of: &Variables<'_>) -> Result<Option<String>, Error> {
    let lists = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
    let Some((name, list)) = lists.into_iter().find_map(|name| Some((name, of.text(name)?))) else { return Ok(None) };
    let invalid = || Error::Variables(format!("{name} is \"{list}\", which is no list of hosts; set MASTER_ADDR"));
    hostlist::first_host(&list).map(Some).ok_or_else(invalid)
}

/// Returns a port from the number of the job, so that two jobs on a host rarely share one.
fn slurm_port(of: &Variables<'_>) -> Result<Option<u16>, Error> {
    Ok(of.number("SLURM_JOB_ID")?.map(|job| 20_000 + (job % 20_000) as u16))
}

/// `PET_*`, which Kubeflow Trainer sets for torchrun in the only container of each pod.
fn kubeflow(of: &Variables<'_>) -> Result<Option<Launch>, Error> {
    let Some(nodes) = of.text("PET_NNODES") else { return Ok(None) };
    let nodes: usize = nodes.parse().map_err(|_| {
        Error::Variables(format!("PET_NNODES is \"{nodes}\"; ranks need a fixed number of nodes, such as PET_NNODES=2"))
    })?;
    // `auto`, `cpu` and `gpu` are left to `--ranks` and `--gpus`.
    let per_node = of.text("PET_NPROC_PER_NODE").and_then(|count| count.parse().ok()).unwrap_or(1);
    let node_rank = of.number("PET_NODE_RANK")?.or(of.number("JOB_COMPLETION_INDEX")?);
    let node_rank = match (node_rank, nodes) {
        (Some(rank), _) => rank,
        (None, 1) => 0,
        (None, _) => return Err(of.lacks("PET_NNODES", "PET_NODE_RANK")),
    };
    let host = match (of.text("PET_MASTER_ADDR"), nodes) {
        (Some(host), _) => host,
        (None, 1) => "127.0.0.1".to_owned(),
        (None, _) => return Err(of.lacks("PET_NNODES", "PET_MASTER_ADDR")),
    };
    let master = MasterAddress::new(host, of.port("PET_MASTER_PORT")?.unwrap_or(DEFAULT_PORT));
    node_launch("Kubeflow Trainer", NodeLaunch { node_rank, nodes, ranks_per_node: per_node, master }).map(Some)
}

/// `SKYPILOT_*`, for one process on each of several hosts.
fn skypilot(of: &Variables<'_>) -> Result<Option<Launch>, Error> {
    let Some(nodes) = of.number("SKYPILOT_NUM_NODES")?.filter(|nodes| *nodes > 1) else { return Ok(None) };
    let node_rank = of.number("SKYPILOT_NODE_RANK")?;
    let node_rank = node_rank.ok_or_else(|| of.lacks("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"))?;
    let hosts = of.text("SKYPILOT_NODE_IPS").ok_or_else(|| of.lacks("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_IPS"))?;
    let host = of.text("MASTER_ADDR").or_else(|| hosts.split_whitespace().next().map(str::to_owned));
    let host = host.ok_or_else(|| of.lacks("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_IPS"))?;
    let per_node = of.number("SKYPILOT_NUM_GPUS_PER_NODE")?.unwrap_or(0).max(1);
    let master = MasterAddress::new(host, of.port("MASTER_PORT")?.unwrap_or(DEFAULT_PORT));
    node_launch("SkyPilot", NodeLaunch { node_rank, nodes, ranks_per_node: per_node, master }).map(Some)
}

fn node_launch(launcher: &'static str, node: NodeLaunch) -> Result<Launch, Error> {
    if node.node_rank >= node.nodes || node.ranks_per_node == 0 {
        return Err(Error::Variables(format!(
            "the variables of {launcher} describe node {} of {} with {} ranks, which is no node",
            node.node_rank, node.nodes, node.ranks_per_node
        )));
    }
    let role = if node.nodes * node.ranks_per_node == 1 { LaunchRole::Alone } else { LaunchRole::Node(node) };
    Ok(Launch { launcher: Some(launcher), role, restarts: 0 })
}

#[cfg(test)]
mod tests;
