//! Parallel download of all required files of a commit.

use std::collections::BTreeMap;
use std::fs;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::runtime::Builder;

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
    let runtime = Builder::new_multi_thread().worker_threads(MAX_PARALLEL).enable_all().build();
    let runtime = runtime.map_err(|source| Error::Io { path: repo.path(), source })?;
    let (progress, updates) = mpsc::channel();
    // The caller may be inside its own runtime, and its callback need not be `Send`.
    thread::scope(|scope| {
        let worker = scope.spawn(move || runtime.block_on(run(request, repo, token, wanted, progress)));
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
    let runtime = Builder::new_multi_thread().worker_threads(MAX_PARALLEL).enable_all().build();
    let runtime = runtime.map_err(|source| Error::Io { path: repo.path(), source })?;
    thread::scope(|scope| {
        let worker = scope.spawn(move || runtime.block_on(look(request, repo, token)));
        worker.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

async fn look(
    request: Request,
    repo: CachedRepo,
    token: Option<String>,
) -> Result<(Resolved, CheckpointHeaders), Error> {
    let api = Api::new(request.clone(), token)?;
    let here = |resolved: Resolved| CheckpointHeaders::open(&resolved.path).map(|headers| (resolved, headers));
    let (commit, all) = match retry(&FIRST_DELAYS, || api.files()).await {
        Ok(found) => found,
        Err(error) => {
            let found = without_hub(&request, &repo, &api, &RequiredFiles::Model, error).await?;
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
    let fetcher = Arc::new(Fetcher { api, repo, commit });
    fetch_missing(&fetcher, selection.descriptions(), &unobserved).await?;
    fetcher.repo.write_reference(&request.revision, &fetcher.commit)?;
    let weights = match selection.weights() {
        Some(file) => vec![file.to_owned()],
        None => ShardIndex::read(&path.join(INDEX_FILE))?.shards().into_iter().map(str::to_owned).collect(),
    };
    let heads = run_parallel(weights, |file| {
        let fetcher = fetcher.clone();
        async move { head(&fetcher, &file).await }
    });
    let is_adapter = selection.weights() == Some(ADAPTER_FILE);
    let mut headers = CheckpointHeaders { path, is_adapter, tensors: BTreeMap::new() };
    for (file, head) in heads.await? {
        headers.add(&file.name, &head, file.size)?;
    }
    Ok((resolved, headers))
}

/// Returns the beginning of a file with its whole header, and the file's size.
async fn head(fetcher: &Fetcher, file: &str) -> Result<(RemoteFile, Vec<u8>), Error> {
    let Fetcher { api, commit, .. } = fetcher;
    let file = retry(&DELAYS, || api.describe(commit, file)).await?;
    let size = usize::try_from(file.size).unwrap_or(usize::MAX);
    let mut head = Vec::new();
    let mut wanted = FIRST_BYTES.min(size);
    while head.len() < wanted {
        head = retry(&DELAYS, || api.head(commit, &file, head.clone(), wanted)).await?;
        // An invalid header is reported when it is parsed.
        wanted = safetensors_header::header_length(&head).map_or(wanted, |length| size.min(length as usize));
    }
    Ok((file, head))
}

async fn run(
    request: Request,
    repo: CachedRepo,
    token: Option<String>,
    wanted: RequiredFiles,
    progress: Sender<Progress>,
) -> Result<Snapshot, Error> {
    let api = Api::new(request.clone(), token)?;
    let (commit, all) = match retry(&FIRST_DELAYS, || api.files()).await {
        Ok(found) => found,
        Err(error) => return without_hub(&request, &repo, &api, &wanted, error).await,
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
    let fetcher = Arc::new(Fetcher { api, repo, commit });
    if sharded {
        let (unobserved, _) = mpsc::channel();
        fetch_missing(&fetcher, vec![INDEX_FILE.to_owned()], &unobserved).await?;
        let index = ShardIndex::read(&snapshot.join(INDEX_FILE))?;
        files.extend(index.shards().into_iter().map(str::to_owned));
    }
    fetch_missing(&fetcher, files.clone(), &progress).await?;
    fetcher.repo.write_reference(&request.revision, &fetcher.commit)?;
    Ok(Snapshot { files, resolved: Resolved { path: snapshot, commit: Some(fetcher.commit.clone()), notice: None } })
}

/// Downloads the files that the snapshot lacks and links them into it.
async fn fetch_missing(fetcher: &Arc<Fetcher>, files: Vec<String>, progress: &Sender<Progress>) -> Result<(), Error> {
    let Fetcher { api, repo, commit } = &**fetcher;
    let snapshot = repo.snapshot(commit);
    let lacking = files.into_iter().filter(|file| !snapshot.join(file).exists());
    let lacking = run_parallel(lacking, |file| {
        let fetcher = fetcher.clone();
        async move { retry(&DELAYS, || fetcher.api.describe(&fetcher.commit, &file)).await }
    })
    .await?;
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
    run_parallel(absent, |file| {
        let (fetcher, progress) = (fetcher.clone(), progress.clone());
        async move { fetcher.fetch(&file, &progress).await }
    })
    .await?;
    lacking.iter().try_for_each(|file| repo.link(commit, &file.name, &file.etag))
}

/// Runs a task for every item, several in parallel, until one fails.
async fn run_parallel<I, T, F>(items: impl IntoIterator<Item = I>, task: impl Fn(I) -> F) -> Result<Vec<T>, Error>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    let tasks = stream::iter(items).map(|item| tokio::spawn(task(item))).buffer_unordered(MAX_PARALLEL);
    let results = tasks.map(|ended| ended.unwrap_or_else(|error| resume_unwind(error.into_panic())));
    results.try_collect().await
}

/// Handles an unanswered first request: returns the cached snapshot, or the error with advice.
async fn without_hub(
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
            let revisions = api.revisions().await;
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
