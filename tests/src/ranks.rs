//! Ranks as threads of this process.

use std::net::TcpListener;
use std::sync::Arc;
use std::thread;

use rekindle_dist::{Communicator, MasterAddress, RankLaunch, RankPosition, TcpCommunicator, TcpOptions, supervise};
use rekindle_train::Error;

/// Runs `work` on a thread for each rank, with its own connections.
pub fn on_ranks<T: Send>(
    ranks: usize,
    work: impl Fn(Arc<dyn Communicator>) -> Result<T, Error> + Sync,
) -> Vec<Result<T, Error>> {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let master = MasterAddress::new("127.0.0.1", free.port());
    let rank = |rank| {
        let position = RankPosition { rank, world_size: ranks, local_rank: rank, local_world_size: ranks };
        let launch = RankLaunch { position, master: master.clone(), attempt: String::new() };
        let work = &work;
        move || {
            let world: Arc<dyn Communicator> = Arc::new(TcpCommunicator::connect(&launch, TcpOptions::default())?);
            supervise(&*world, || work(Arc::clone(&world)))
        }
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..ranks).map(|number| scope.spawn(rank(number))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}
