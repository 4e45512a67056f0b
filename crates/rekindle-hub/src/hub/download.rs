//! All files of a commit that are needed, several at once.

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
use crate::header;
use crate::index::{INDEX_FILE, ShardIndex};
use crate::{Error, Headers, HubErrorKind};

use super::api::{Api, RemoteFile};
use super::failure::{DELAYS, FIRST_DELAYS, Request, retry};
use super::fetch::{Fetcher, Progress};
use super::layout::{CachedRepo, create_dir, lacks};
use super::select::{Selection, select};
use super::{Found, MAIN, Resolved, Wanted, cached, space};

/// How many files are on their way at once.
const AT_ONCE: usize = 8;

/// How much of a file is asked for to find its header: all of it, of most.
const FIRST_BYTES: usize = 100_000;

/// How many branches and tags an error lists.
const MOST_REVISIONS: usize = 10;

/// Looks the revision up, downloads what the cache lacks, and makes the snapshot.
pub(crate) fn download(
    request: Request,
    repo: CachedRepo,
    token: Option<String>,
    wanted: Wanted,
    mut on_progress: Option<Box<dyn FnMut(u64, u64) + '_>>,
) -> Result<Found, Error> {
    let runtime = Builder::new_multi_thread().worker_threads(AT_ONCE).enable_all().build();
    let runtime = runtime.map_err(|source| Error::Io { path: repo.path(), source })?;
    let (progress, updates) = mpsc::channel();
    // The caller may be inside a runtime of its own, and its callback need not be sent to threads.
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

/// Looks the revision up and reads what its weights are; those stay where they are.
pub(crate) fn describe(
    request: Request,
    repo: CachedRepo,
    token: Option<String>,
) -> Result<(Resolved, Headers), Error> {
    let runtime = Builder::new_multi_thread().worker_threads(AT_ONCE).enable_all().build();
    let runtime = runtime.map_err(|source| Error::Io { path: repo.path(), source })?;
    thread::scope(|scope| {
        let worker = scope.spawn(move || runtime.block_on(look(request, repo, token)));
        worker.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

async fn look(request: Request, repo: CachedRepo, token: Option<String>) -> Result<(Resolved, Headers), Error> {
    let api = Api::new(request.clone(), token)?;
    let here = |resolved: Resolved| Headers::open(&resolved.path).map(|headers| (resolved, headers));
    let (commit, all) = match retry(&FIRST_DELAYS, || api.files()).await {
        Ok(found) => found,
        Err(error) => {
            let found = without_hub(&request, &repo, &api, &Wanted::Model, error).await?;
            return here(found.resolved);
        }
    };
    let selection = select(&all).map_err(|reason| request.error(HubErrorKind::Weights, reason))?;
    let path = repo.snapshot(&commit);
    let resolved = Resolved { path: path.clone(), commit: Some(commit.clone()), notice: None };
    if lacks(&path).is_none() {
        return here(resolved);
    }
    let (unheard, _) = mpsc::channel();
    let fetcher = Arc::new(Fetcher { api, repo, commit });
    bring(&fetcher, selection.descriptions(), &unheard).await?;
    fetcher.repo.write_reference(&request.revision, &fetcher.commit)?;
    let weights = match selection.weights() {
        Some(file) => vec![file.to_owned()],
        None => ShardIndex::read(&path.join(INDEX_FILE))?.shards().into_iter().map(str::to_owned).collect(),
    };
    let heads = at_once(weights, |file| {
        let fetcher = fetcher.clone();
        async move { head(&fetcher, &file).await }
    });
    let is_adapter = selection.weights() == Some(ADAPTER_FILE);
    let mut headers = Headers { path, is_adapter, tensors: BTreeMap::new() };
    for (file, head) in heads.await? {
        headers.add(&file.name, &head, file.size)?;
    }
    Ok((resolved, headers))
}

/// A file's header, with what comes along.
async fn head(fetcher: &Fetcher, file: &str) -> Result<(RemoteFile, Vec<u8>), Error> {
    let Fetcher { api, commit, .. } = fetcher;
    let file = retry(&DELAYS, || api.describe(commit, file)).await?;
    let size = usize::try_from(file.size).unwrap_or(usize::MAX);
    let mut head = Vec::new();
    let mut wanted = FIRST_BYTES.min(size);
    while head.len() < wanted {
        head = retry(&DELAYS, || api.head(commit, &file, head.clone(), wanted)).await?;
        // What is no header is said when it is read.
        wanted = header::length(&head).map_or(wanted, |length| size.min(length as usize));
    }
    Ok((file, head))
}

async fn run(
    request: Request,
    repo: CachedRepo,
    token: Option<String>,
    wanted: Wanted,
    progress: Sender<Progress>,
) -> Result<Found, Error> {
    let api = Api::new(request.clone(), token)?;
    let (commit, all) = match retry(&FIRST_DELAYS, || api.files()).await {
        Ok(found) => found,
        Err(error) => return without_hub(&request, &repo, &api, &wanted, error).await,
    };
    let Selection { mut files, sharded } = match &wanted {
        Wanted::Model => select(&all).map_err(|reason| request.error(HubErrorKind::Weights, reason))?,
        Wanted::Rows(part) => {
            let files = part.select(&all).map_err(|reason| request.error(HubErrorKind::Rows, reason))?;
            Selection { files, sharded: false }
        }
    };
    // Keeps pruning away. A cache that cannot be written can still have everything.
    let lock = repo.use_lock().ok();
    if let Some(lock) = &lock {
        let _ = lock.lock_shared();
    }
    let snapshot = repo.snapshot(&commit);
    let fetcher = Arc::new(Fetcher { api, repo, commit });
    if sharded {
        let (unheard, _) = mpsc::channel();
        bring(&fetcher, vec![INDEX_FILE.to_owned()], &unheard).await?;
        let index = ShardIndex::read(&snapshot.join(INDEX_FILE))?;
        files.extend(index.shards().into_iter().map(str::to_owned));
    }
    bring(&fetcher, files.clone(), &progress).await?;
    fetcher.repo.write_reference(&request.revision, &fetcher.commit)?;
    Ok(Found { files, resolved: Resolved { path: snapshot, commit: Some(fetcher.commit.clone()), notice: None } })
}

/// Downloads those of `files` that the snapshot lacks, and links them into it.
async fn bring(fetcher: &Arc<Fetcher>, files: Vec<String>, progress: &Sender<Progress>) -> Result<(), Error> {
    let Fetcher { api, repo, commit } = &**fetcher;
    let snapshot = repo.snapshot(commit);
    let lacking = files.into_iter().filter(|file| !snapshot.join(file).exists());
    let lacking = at_once(lacking, |file| {
        let fetcher = fetcher.clone();
        async move { retry(&DELAYS, || fetcher.api.describe(&fetcher.commit, &file)).await }
    })
    .await?;
    let mut absent: Vec<_> = lacking.iter().filter(|file| !repo.blob(&file.etag).exists()).cloned().collect();
    // Files with the same contents are one blob.
    absent.sort_by(|a, b| a.etag.cmp(&b.etag));
    absent.dedup_by(|a, b| a.etag == b.etag);
    if !absent.is_empty() {
        create_dir(&repo.blobs())?;
        let here = |file: &RemoteFile| fs::metadata(repo.incomplete(&file.etag)).map_or(0, |about| about.len());
        let needed = absent.iter().map(|file| file.size.saturating_sub(here(file)));
        space::check(api.request(), &repo.blobs(), needed.fold(0, u64::saturating_add))?;
        let _ = progress.send(Progress::Total(absent.iter().map(|file| file.size).sum()));
    }
    at_once(absent, |file| {
        let (fetcher, progress) = (fetcher.clone(), progress.clone());
        async move { fetcher.fetch(&file, &progress).await }
    })
    .await?;
    lacking.iter().try_for_each(|file| repo.link(commit, &file.name, &file.etag))
}

/// Runs a task for every item, some at once, until one fails.
async fn at_once<I, T, F>(items: impl IntoIterator<Item = I>, task: impl Fn(I) -> F) -> Result<Vec<T>, Error>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    let tasks = stream::iter(items).map(|item| tokio::spawn(task(item))).buffer_unordered(AT_ONCE);
    let results = tasks.map(|ended| ended.unwrap_or_else(|error| resume_unwind(error.into_panic())));
    results.try_collect().await
}

/// What there is without an answer to the first request: the cache, or the error and what helps.
async fn without_hub(
    request: &Request,
    repo: &CachedRepo,
    api: &Api,
    wanted: &Wanted,
    error: Error,
) -> Result<Found, Error> {
    match error.hub_kind() {
        Some(HubErrorKind::Network | HubErrorKind::Response) => match cached(request, repo, wanted) {
            Ok(Found { resolved, files }) => {
                let commit = resolved.commit.as_deref().unwrap_or_default();
                let notice = format!("{error}; using commit {commit} from the cache");
                Ok(Found { resolved: Resolved { notice: Some(notice), ..resolved }, files })
            }
            Err(_) => Err(error),
        },
        Some(HubErrorKind::NotFound) if request.revision != MAIN => {
            let revisions = api.revisions().await;
            if revisions.is_empty() {
                return Err(error);
            }
            let listed = quoted(revisions.iter().take(MOST_REVISIONS).map(String::as_str));
            let more = if revisions.len() > MOST_REVISIONS { ", …" } else { "" };
            let reason = format!("it has no branch, tag or commit {:?}; it has {listed}{more}", request.revision);
            Err(request.error(HubErrorKind::NotFound, reason))
        }
        _ => Err(error),
    }
}
