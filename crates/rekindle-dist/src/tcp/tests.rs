use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use super::*;
use crate::{MasterAddress, OneRank, supervise};

/// Returns a port that is free now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn launch(rank: usize, world_size: usize, port: u16) -> RankLaunch {
    let position = RankPosition { rank, world_size, local_rank: rank, local_world_size: world_size };
    RankLaunch { position, master: MasterAddress::new("127.0.0.1", port), attempt: "test 0".to_owned() }
}

fn quick() -> TcpOptions {
    TcpOptions {
        rendezvous_timeout: Duration::from_secs(20),
        heartbeat_timeout: Duration::from_secs(10),
        on_failure: None,
    }
}

/// Runs `work` on a thread for each rank; returns the results in the order of the ranks.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&TcpCommunicator) -> T + Sync) -> Vec<T> {
    let port = free_port();
    let rank = |rank| {
        let work = &work;
        move || work(&TcpCommunicator::connect(&launch(rank, ranks, port), quick()).unwrap())
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..ranks).map(|number| scope.spawn(rank(number))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn sums_have_the_same_bits_everywhere() {
    // Longer than two chunks, and of sums that depend on their order.
    let length = 2 * CHUNK + 5;
    let value = |rank: usize, index: usize| ((index % 1000) as f32 + 0.1) * [1.0, 1e-7, -1.0, 3e-4][rank];
    for ranks in [2, 3, 4] {
        let all = on_ranks(ranks, |world| {
            let mut values: Vec<f32> = (0..length).map(|index| value(world.rank(), index)).collect();
            world.all_reduce_sum(&mut values).unwrap();
            world.finish().unwrap();
            values
        });
        for (index, sum) in all[0].iter().enumerate() {
            let expected = (1..ranks).fold(value(0, index), |sum, rank| sum + value(rank, index));
            assert_eq!(sum.to_bits(), expected.to_bits(), "{ranks} ranks, value {index}");
        }
        assert!(all.iter().all(|values| values == &all[0]));
    }
}

/// A shard has the bits of an all-reduce, and gathering the shards gives all of it. Shards cross chunks, and one is empty.
#[test]
fn shards_have_the_sums_of_an_all_reduce() {
    let length = 2 * CHUNK + 5;
    let cuts = [0, CHUNK - 3, CHUNK - 3, CHUNK + 7, length];
    let shards: Vec<Range<usize>> = cuts.windows(2).map(|pair| pair[0]..pair[1]).collect();
    let all = on_ranks(4, |world| {
        let rank = world.rank();
        let mut values: Vec<f32> =
            (0..length).map(|index| (index % 1000) as f32 * [1.0, 1e-7, -1.0, 3e-4][rank]).collect();
        let mut sums = values.clone();
        world.all_reduce_sum(&mut sums).unwrap();
        world.reduce_scatter_sum(&mut values, &shards).unwrap();
        assert_eq!(values[shards[rank].clone()], sums[shards[rank].clone()], "rank {rank}");
        // Nothing but its own shard is used.
        for (other, shard) in shards.iter().enumerate().filter(|(other, _)| *other != rank) {
            values[shard.clone()].fill(f32::NAN * other as f32);
        }
        world.all_gather_shards(&mut values, &shards).unwrap();
        let gathered = world.gather(vec![rank as u8; rank]).unwrap();
        world.finish().unwrap();
        (values == sums, gathered)
    });
    assert!(all.iter().all(|(is_equal, _)| *is_equal));
    assert_eq!(all[0].1, Some(vec![vec![], vec![1], vec![2, 2], vec![3, 3, 3]]));
    assert!(all[1..].iter().all(|(_, gathered)| gathered.is_none()));
}

#[test]
fn bytes_of_all_ranks_and_of_the_first() {
    let all = on_ranks(3, |world| {
        let rank = world.rank();
        let gathered = world.all_gather(&vec![rank as u8; rank]).unwrap();
        let shared = world.broadcast(vec![rank as u8 + 7; 2]).unwrap();
        world.barrier().unwrap();
        world.all_reduce_sum(&mut []).unwrap();
        supervise(world, || Ok::<_, Error>((gathered, shared))).unwrap()
    });
    for (gathered, shared) in all {
        assert_eq!(gathered, [vec![], vec![1], vec![2, 2]]);
        assert_eq!(shared, [7, 7]);
    }
}

#[test]
fn one_rank_sums_nothing() {
    let mut values = [1.5];
    OneRank.all_reduce_sum(&mut values).unwrap();
    assert_eq!((values, OneRank.all_gather(b"x").unwrap()), ([1.5], vec![b"x".to_vec()]));
}

#[test]
fn an_error_of_any_rank_is_the_error_of_all() {
    for failing in 0..3 {
        let began = Instant::now();
        let errors = on_ranks(3, |world| {
            supervise(world, || {
                world.barrier()?;
                if world.rank() == failing {
                    return Err(Error::Variables("the disk is full".to_owned()));
                }
                world.all_reduce_sum(&mut vec![0.0; 1 << 20])
            })
            .unwrap_err()
        });
        for (rank, error) in errors.iter().enumerate() {
            match error {
                Error::Rank(failure) => {
                    assert_eq!((failure.rank, &*failure.message), (failing, "the disk is full"));
                    assert!(!failure.host.is_empty());
                }
                own => assert_eq!((rank, own.to_string()), (failing, "the disk is full".to_owned())),
            }
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
}

#[test]
fn a_panic_is_a_failure_too() {
    let failures = on_ranks(2, |world| {
        let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            supervise(world, || {
                assert!(world.rank() != 1, "one is odd");
                world.barrier()
            })
        }));
        panics.ok().map(|result| result.unwrap_err().to_string())
    });
    let [Some(first), None] = &failures[..] else { panic!("{failures:?}") };
    assert!(first.contains("rank 1 on ") && first.contains("panicked: one is odd"), "{first}");
}

#[test]
fn ranks_that_call_different_operations_end() {
    let errors = on_ranks(2, |world| match world.rank() {
        0 => world.all_reduce_sum(&mut [0.0; 3]).unwrap_err().to_string(),
        _ => world.all_gather(&[1]).unwrap_err().to_string(),
    });
    for error in errors {
        assert!(
            error.contains("rank 1") && error.contains("all-gather 1") && error.contains("all-reduce 1 of 3"),
            "{error}"
        );
    }
}

#[test]
fn a_rank_that_computes_hears_of_a_failure() {
    let heard = Arc::new(AtomicUsize::new(0));
    let port = free_port();
    thread::scope(|scope| {
        for rank in 0..2 {
            let heard = Arc::clone(&heard);
            scope.spawn(move || {
                let counts = Arc::clone(&heard);
                let on_failure: OnFailure = Arc::new(move |failure| {
                    assert_eq!((failure.rank, &*failure.message), (1, "out of memory"));
                    counts.fetch_add(1, Ordering::SeqCst);
                });
                let options = TcpOptions { on_failure: Some(on_failure), ..quick() };
                let world = TcpCommunicator::connect(&launch(rank, 2, port), options).unwrap();
                if rank == 1 {
                    return world.fail("out of memory");
                }
                let began = Instant::now();
                while heard.load(Ordering::SeqCst) == 0 {
                    assert!(began.elapsed() < Duration::from_secs(5));
                    thread::sleep(Duration::from_millis(1));
                }
            });
        }
    });
    assert_eq!(heard.load(Ordering::SeqCst), 1, "the rank that fails knows");
}

#[test]
fn silence_is_a_failure() {
    let port = free_port();
    thread::scope(|scope| {
        let rank0 = scope.spawn(move || {
            let options = TcpOptions { heartbeat_timeout: Duration::from_millis(500), ..quick() };
            let world = TcpCommunicator::connect(&launch(0, 2, port), options).unwrap();
            world.barrier().unwrap_err().to_string()
        });
        // A rank whose process stands still: it is connected, and nothing comes from it.
        let link = rendezvous::meet(&launch(1, 2, port), "still", Duration::from_secs(10)).unwrap();
        let error = rank0.join().unwrap();
        assert!(error.contains("rank 1 on still failed: no sign of life"), "{error}");
        drop(link);
    });
}

#[test]
fn ranks_of_another_run_and_other_programs_are_refused() {
    let port = free_port();
    thread::scope(|scope| {
        let rank0 = scope.spawn(move || TcpCommunicator::connect(&launch(0, 2, port), quick()).unwrap().finish());
        let short = |launch: &RankLaunch| {
            rendezvous::meet(launch, "h", Duration::from_millis(300)).map(|_| ()).unwrap_err().to_string()
        };
        let other = RankLaunch { attempt: "other 1".to_owned(), ..launch(1, 2, port) };
        assert!(short(&other).contains("another run listens"), "{}", short(&other));
        assert!(short(&launch(1, 3, port)).contains("one of 3 ranks, and rank 0 as one of 2"));
        let mut stranger = TcpStream::connect(("127.0.0.1", port)).unwrap();
        std::io::Write::write_all(&mut stranger, b"GET / HTTP/1.1\r\n\r\n").unwrap();
        drop(stranger);
        TcpCommunicator::connect(&launch(1, 2, port), quick()).unwrap().finish().unwrap();
        rank0.join().unwrap().unwrap();
    });
}

#[test]
fn missing_ranks_are_named() {
    let launch = |rank| launch(rank, 4, free_port());
    let brief = TcpOptions { rendezvous_timeout: Duration::from_millis(200), ..quick() };
    let error = |rank| TcpCommunicator::connect(&launch(rank), brief.clone()).map(|_| ()).unwrap_err().to_string();
    assert!(error(0).contains("ranks 1, 2, 3 of 4 have not connected to 127.0.0.1:"), "{}", error(0));
    assert!(error(2).contains("rank 2 has not found rank 0 at 127.0.0.1:"), "{}", error(2));
}

#[test]
fn a_port_in_use_is_passed_over() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let at = |rank, ports: &[u16]| {
        let master = MasterAddress { host: "127.0.0.1".to_owned(), ports: ports.to_vec() };
        RankLaunch { master, ..launch(rank, 2, port) }
    };
    let error = TcpCommunicator::connect(&at(0, &[port]), quick()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("cannot listen") && error.contains("MASTER_PORT"), "{error}");
    let ports = [port, free_port()];
    thread::scope(|scope| {
        for rank in 0..2 {
            let launch = at(rank, &ports);
            scope.spawn(move || TcpCommunicator::connect(&launch, quick()).unwrap().finish().unwrap());
        }
    });
}
