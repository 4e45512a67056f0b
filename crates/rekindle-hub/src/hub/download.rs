//! Parallel download of all required files of a commit.

use std::collections::BTreeMap;
use std::fs;
use std::panic::resume_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;

use crate::adapter::ADAPTER_FILE;
use crate::error::quoted;
use crate::index::{INDEX_FILE, ShardIndex};
use crate::safetensors_header;
use crate::{CheckpointHeaders, Error, HubErrorKind};

use super::api::{Api, RemoteFile};
use super::failure::{DELAYS, FIRST_DELAYS, Request, retry};
use super::fetch::{Fetcher, Progress};
use super::layout::{CachedRepo, create_dir, lacks};
use super::select::{Selection, select};
use super::{MAIN, RequiredFiles, Resolved, Snapshot, cached, space};

/// The maximum number of parallel downloads.
const MAX_PARALLEL: usize = 8;

/// The number of bytes requested to find a file's header, enough for most files.
const FIRST_BYTES: usize = 100_000;

/// The maximum number of branches and tags in an error.
const MAX_LISTED_REVISIONS: usize = 10;

/// Looks up the revision, downloads what the cache lacks, and creates the snapshot.
pub(crate) fn download(
    request: Request,
    repo: CachedRepo,
    token: Option<String>,
    wanted: RequiredFiles,
    mut on_progress: Option<Box<dyn FnMut(u64, u64) + '_>>,
) -> Result<Snapshot, Error> {
    let (progress, updates) = mpsc::channel();
    // The callback need not be `Send`.
    thread::scope(|scope| {
        let worker = scope.spawn(move || run(request, repo, token, wanted, progress));
        let (mut done, mut total) = (0_i64, 0);
        for update in updates {
            match update {
                Progress::Total(bytes) => total = bytes,
                Progress::Arrived(bytes) => done += bytes,
            }
            if let Some(on_progress) = &mut on_progress {
                on_progress(u64::try_from(done).unwrap_or(0), total);
            }
        }
        worker.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Looks up the revision and reads the headers of its weights without downloading the weights.
pub(crate) fn describe(
    request: Request,
    repo: CachedRepo,
    token: Option<String>,
) -> Result<(Resolved, CheckpointHeaders), Error> {
    let api = Api::new(request.clone(), token)?;
    let here = |resolved: Resolved| CheckpointHeaders::open(&resolved.path).map(|headers| (resolved, headers));
    let (commit, all) = match retry(&FIRST_DELAYS, || api.files()) {
        Ok(found) => found,
        Err(error) => {
            let found = without_hub(&request, &repo, &api, &RequiredFiles::Model, error)?;
            return here(found.resolved);
        }
    };
    let selection = select(&all).map_err(|reason| request.error(HubErrorKind::Weights, reason))?;
    let path = repo.snapshot(&commit);
    let resolved = Resolved { path: path.clone(), commit: Some(commit.clone()), notice: None };
    if lacks(&path).is_none() {
        return here(resolved);
    }
    let (unobserved, _) = mpsc::channel();
    let fetcher = Fetcher { api, repo, commit, is_cancelled: AtomicBool::new(false) };
    fetch_missing(&fetcher, selection.descriptions(), &unobserved)?;
    fetcher.repo.write_reference(&request.revision, &fetcher.commit)?;
    let weights = match selection.weights() {
        Some(file) => vec![file.to_owned()],
        None => ShardIndex::read(&path.join(INDEX_FILE))?.shards().into_iter().map(str::to_owned).collect(),
    };
    let heads = run_parallel(&fetcher.is_cancelled, weights, |file| head(&fetcher, &file));
    let is_adapter = selection.weights() == Some(ADAPTER_FILE);
    let mut headers = CheckpointHeaders { path, is_adapter, tensors: BTreeMap::new() };
    for (file, head) in heads? {
        headers.add(&file.name, &head, file.size)?;
    }
    Ok((resolved, headers))
}

/// Returns the beginning of a file with its whole header, and the file's size.
fn head(fetcher: &Fetcher, file: &str) -> Result<(RemoteFile, Vec<u8>), Error> {
    let Fetcher { api, commit, .. } = fetcher;
    let file = retry(&DELAYS, || api.describe(commit, file))?;
    let size = usize::try_from(file.size).unwrap_or(usize::MAX);
    let mut head = Vec::new();
    let mut wanted = FIRST_BYTES.min(size);
    while head.len() < wanted {
        head = retry(&DELAYS, || api.head(commit, &file, head.clone(), wanted))?;
        // An invalid header is reported when it is parsed.
        wanted = safetensors_header::header_length(&head).map_or(wanted, |length| size.min(length as usize));
    }
    Ok((file, head))
}

fn run(
    request: Request,
    repo: CachedRepo,
    token: Option<String>,
    wanted: RequiredFiles,
    progress: Sender<Progress>,
) -> Result<Snapshot, Error> {
    let api = Api::new(request.clone(), token)?;
    let (commit, all) = match retry(&FIRST_DELAYS, || api.files()) {
        Ok(found) => found,
        Err(error) => return without_hub(&request, &repo, &api, &wanted, error),
    };
    let Selection { mut files, sharded } = match &wanted {
        RequiredFiles::Model => select(&all).map_err(|reason| request.error(HubErrorKind::Weights, reason))?,
        RequiredFiles::Rows(part) => {
            let files = part.select(&all).map_err(|reason| request.error(HubErrorKind::Rows, reason))?;
            Selection { files, sharded: false }
        }
    };
    // Blocks pruning. A read-only cache may still be complete, so a failure is ignored.
    let lock = repo.use_lock().ok();
    if let Some(lock) = &lock {
        let _ = lock.lock_shared();
    }
    let snapshot = repo.snapshot(&commit);
    let fetcher = Fetcher { api, repo, commit, is_cancelled: AtomicBool::new(false) };
    if sharded {
        let (unobserved, _) = mpsc::channel();
        fetch_missing(&fetcher, vec![INDEX_FILE.to_owned()], &unobserved)?;
        let index = ShardIndex::read(&snapshot.join(INDEX_FILE))?;
        files.extend(index.shards().into_iter().map(str::to_owned));
    }
    fetch_missing(&fetcher, files.clone(), &progress)?;
    fetcher.repo.write_reference(&request.revision, &fetcher.commit)?;
    Ok(Snapshot { files, resolved: Resolved { path: snapshot, commit: Some(fetcher.commit.clone()), notice: None } })
}

/// Downloads the files that the snapshot lacks and links them into it.
fn fetch_missing(fetcher: &Fetcher, files: Vec<String>, progress: &Sender<Progress>) -> Result<(), Error> {
    let Fetcher { api, repo, commit, is_cancelled } = fetcher;
    let snapshot = repo.snapshot(commit);
    let lacking = files.into_iter().filter(|file| !snapshot.join(file).exists());
    let describe = |file: String| retry(&DELAYS, || api.describe(commit, &file));
    let lacking = run_parallel(is_cancelled, lacking, describe)?;
    let mut absent: Vec<_> = lacking.iter().filter(|file| !repo.blob(&file.etag).exists()).cloned().collect();
    // Files with equal contents share one blob.
    absent.sort_by(|a, b| a.etag.cmp(&b.etag));
    absent.dedup_by(|a, b| a.etag == b.etag);
    if !absent.is_empty() {
        create_dir(&repo.blobs())?;
        let here = |file: &RemoteFile| fs::metadata(repo.incomplete(&file.etag)).map_or(0, |about| about.len());
        let needed = absent.iter().map(|file| file.size.saturating_sub(here(file)));
        space::check(api.request(), &repo.blobs(), needed.fold(0, u64::saturating_add))?;
        let _ = progress.send(Progress::Total(absent.iter().map(|file| file.size).sum()));
    }
    let absent: Vec<_> = absent.into_iter().map(|file| (file, progress.clone())).collect();
    run_parallel(is_cancelled, absent, |(file, progress)| fetcher.fetch(&file, &progress))?;
    lacking.iter().try_for_each(|file| repo.link(commit, &file.name, &file.etag))
}

/// Runs a task for every item, several in parallel, and returns the results in the order of the items.
///
/// The first error is returned. It sets `is_cancelled`, which ends the other tasks early.
fn run_parallel<I: Send, T: Send>(
    is_cancelled: &AtomicBool,
    items: impl IntoIterator<Item = I>,
    task: impl Fn(I) -> Result<T, Error> + Sync,
) -> Result<Vec<T>, Error> {
    let items: Vec<I> = items.into_iter().collect();
    let threads = items.len().min(MAX_PARALLEL);
    let queue = Mutex::new(items.into_iter().enumerate());
    let (results, received) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads {
            let (results, queue, task) = (results.clone(), &queue, &task);
            scope.spawn(move || {
                loop {
                    let next = queue.lock().expect("no task panics while it takes an item").next();
                    let Some((index, item)) = next.filter(|_| !is_cancelled.load(Ordering::Relaxed)) else { return };
                    let result = task(item);
                    let failed = result.is_err();
                    // The receiver outlives the threads. The error is sent before the others are cancelled, so that it
                    // is the first one received.
                    let _ = results.send((index, result));
                    if failed {
                        is_cancelled.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    drop(results);
    let mut done = Vec::new();
    for (index, result) in received {
        done.push((index, result?));
    }
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// Handles an unanswered first request: returns the cached snapshot, or the error with advice.
fn without_hub(
    request: &Request,
    repo: &CachedRepo,
    api: &Api,
    wanted: &RequiredFiles,
    error: Error,
) -> Result<Snapshot, Error> {
    match error.hub_kind() {
        Some(HubErrorKind::Network | HubErrorKind::Response) => match cached(request, repo, wanted) {
            Ok(Snapshot { resolved, files }) => {
                let commit = resolved.commit.as_deref().unwrap_or_default();
                let notice = format!("{error}; using commit {commit} from the cache");
                Ok(Snapshot { resolved: Resolved { notice: Some(notice), ..resolved }, files })
            }
            Err(_) => Err(error),
        },
        Some(HubErrorKind::NotFound) if request.revision != MAIN => {
            let revisions = api.revisions();
            if revisions.is_empty() {
                return Err(error);
            }
            let listed = quoted(revisions.iter().take(MAX_LISTED_REVISIONS).map(String::as_str));
            let more = if revisions.len() > MAX_LISTED_REVISIONS { ", …" } else { "" };
            let reason = format!("it has no branch, tag or commit {:?}; it has {listed}{more}", request.revision);
            Err(request.error(HubErrorKind::NotFound, reason))
        }
        _ => Err(error),
    }
}
